"""FX → FX passes of fxseek: functionalise, normalise, token facts, ditch.

A pass on a graph returns a new one; a pass on a piece takes the piece over. Nothing in here knows a
model family: nodes are found by operation, fact or metadata. `build` in `fxseek/program.py` runs
them, and README.md says what each takes and gives.
"""
