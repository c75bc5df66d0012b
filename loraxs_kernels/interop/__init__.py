"""Ways in for other LoRA-XS libraries, one module each; none is imported unless asked for.

``official``   the paper's repository: forward, initializer, trained cores in both spellings
``eigentune``  a backend for EigenTune's registry
"""
