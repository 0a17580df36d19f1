"""Numbers in, numbers out: intervals, pairing, power, multiplicity, seeds, the rules of the gate."""
