"""`v05 report`: turns run directories into one self-contained HTML page. This package reads and draws runs, and trains nothing."""
