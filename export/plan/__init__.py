"""From a family and a method to graphs and an ordered list of stages."""
