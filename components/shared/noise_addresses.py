"""Which table number addresses which noise: no two draws of a run may share an address (table, row, step).

Numbers below `MAX_TABLES` are embedding tables, those from there to `FIRST_RESERVED` dense parameters. Above are the
releases that are made once a run, all at step 0, and last the keystreams that draw no noise (`kernels`). Keystream t
of the key that draws a run's noise gives the order in which the units of step t are added up
(`train/mechanism/unit_order.py`); every other use of keystreams has a key of its own, by `derive`.
"""

MAX_TABLES = 0x8000
"""Table numbers from here on address the noise of dense parameters."""

FIRST_RESERVED = 0xFFF0
"""Table numbers from here on belong to no table and no parameter."""

MATRIX_TABLE = 0xFFFC
"""Row i, column j: the noise of entry (i, j) of a noised item-to-item matrix."""

SKETCH_TABLE = 0xFFFD
"""Row i, column j: the noise of item i against direction j of a sketch."""

POPULARITY_TABLE = 0xFFFE
"""Row i, column 0: the noise of the count of item i."""
