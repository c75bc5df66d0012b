"""Ways in for other LoRA-XS libraries, one module each; none is imported unless asked for.

``official``   the paper's repository: forward, initializer, trained cores in both spellings
``peft``       LoRA-XS as a method of PEFT; its TinyLoRA and PSOFT on our kernels
``eigentune``  a backend for EigenTune's registry
``convert``    trained cores from any of these libraries for any other, or as a plain LoRA
"""
