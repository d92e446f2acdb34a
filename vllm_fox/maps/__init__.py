"""Maps of what a model forgets of a text: collected from a model, and written as a page for a browser.

It knows no family. A family says how its tokens are dropped by ``Family.token_ends`` for transformers, and by
:meth:`vllm_fox.attention.step.WorkerState.lower_ends` in an engine.
"""
