"""What a run will need on a machine, worked out before it is there: memory, time, energy."""
