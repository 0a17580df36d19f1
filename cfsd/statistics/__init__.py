"""Statistics of measured numbers: intervals, pairing, power, multiplicity, seeds, and the rules of the gate."""
