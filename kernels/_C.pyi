# The compiled extension: loading it registers `torch.ops.lazydp`; it has no names of its own.
