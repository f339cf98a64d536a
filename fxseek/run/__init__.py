"""What runs a compiled step: its values, sweeps over chunks of tokens, and the five stages.

A step is a small graph module that `assemble.py` makes of a program: prefill, score, select,
gather, learn. To add a stage, write a module of it beside those of `stages.py`, and add and call it
in `_assemble`. Values go from stage to stage in an `Env` (`env.py`), by captured node; a stage runs
pieces of the captured graph (`piece.py`).

Between ``loss.backward()`` and the gradient of a parameter:

1. The loss is `mean_of_parts` of the head's chunks (`head.py`). A trained head has its gradient
   first. With several chunks, or ``recompute="block"``, the logits of a chunk are made again.
2. In one part, autograd goes on through learn. What it saved, hooks gave out (`saved.py`). With
   ``recompute="selective"`` some of that are notes (`selective.py`): the first that is asked for
   runs its region again (`recipe.py`). With ``"block"`` a segment runs again from its inputs, under
   torch's checkpoint (`lowering.py`). A parameter has its gradient as soon as autograd reaches it.
3. In parts (`parts.py`), the head has found its gradients in the forward (not in float16). The
   gradient of the exits arrives at `_Parts`, which runs the body of each part, the last one first,
   and its backward. Gradients of keys and values that belong to earlier parts wait in a `Joint`
   (`fxseek/ops/parts.py`). Parameters have their gradients after the first part of the row, the
   last to run.
"""
