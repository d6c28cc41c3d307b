"""POST /v1/decisions: questions whose answers are known, decided from one prefill each."""
