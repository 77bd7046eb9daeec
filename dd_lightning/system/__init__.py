"""What the rest asks of the machine: files, locks, signals, processors, processes, random numbers; and checks."""
