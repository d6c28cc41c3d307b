"""Typed questions answered from one prefill: probabilities of a few answers, without writing any."""
