"""Run directories in, one self-contained HTML page out. Only what reads, sums up or draws runs may enter; nothing here trains."""
