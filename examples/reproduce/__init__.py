"""The table, the ablations and the figures of TokenSeek (arXiv 2601.19739): see `__main__`."""
