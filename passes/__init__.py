"""FX → FX passes of fxseek: functionalise, normalise, token facts, ditch.

A pass takes over the graph or the piece that it is given; `inline` and `functionalise` copy it.
Nothing in here knows a model family: nodes are found by operation, fact or metadata. `build` in
`fxseek/program.py` runs them, and README.md says what each takes and gives.
"""
