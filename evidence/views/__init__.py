"""What training on the worst view of a pair buys: protocol, runs, findings."""
