"""What runs a compiled step: its values and its five stages.

A step is a small graph module that `assemble.py` makes of a program: prefill, score, select,
gather, learn. To add a stage, write an ``nn.Module`` in `stages.py` or in a file beside it, and add
and call it in `_assemble`. Captured values go from stage to stage in an `Env` (`env.py`), scores
and the selection as arguments; prefill, score and learn run pieces of the captured graph
(`piece.py`). Captured values that a new stage reads belong into `prefilled` (`fxseek/program.py`),
so that the prefill makes them, and sharded parameters into `collectives_of`
(`fxseek/capture/sharded.py`). Timings and memory know each stage by its name.

Between ``loss.backward()`` and the gradient of a parameter:

1. The loss is the mean over the chunks of the head (`head.py`), which is what follows the last
   attention. Its trained parameters have their gradients first. In one part, the logits of a chunk
   are made again where there are several chunks, or with ``recompute="block"``. A model without a
   head has its loss inside learn; one that leaves the loss to the caller, outside.
2. In one part, autograd goes on through learn, from the last layer to the first. Hooks give back
   what it has saved (`saved.py`). With ``recompute="selective"`` some of that is only noted
   (`selective.py`): when backward asks for the first note of a region, the region runs again
   (`recipe.py`). With ``"block"`` each segment runs again from its inputs, under torch's checkpoint
   (`lowering.py`). A compiled backend runs AOTAutograd's backward instead. A parameter has its
   gradient once all its uses have contributed.
3. In parts (`parts.py`), the forward has found the gradients of the head already, which wait for
   that of the loss (except in float16, where the head works as in 1). The gradient of the exits
   arrives at `_Parts`. It runs the body of each part, the last one first, and its backward;
   gradients of keys and values of earlier parts wait in a `Joint` (`fxseek/ops/parts.py`). The
   parameters of the body have their gradients all at once, when the first part of the row, which
   runs last, is done.
"""
