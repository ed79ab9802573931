"""Imported last by a server that others are forked from: collections in the forks pass over what is there by now,
and do not copy its pages."""

import gc

gc.collect()
gc.freeze()
