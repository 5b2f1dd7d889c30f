"""The dynamic convolutions, a file each: a class of `DynamicConv2d` in a new file is known everywhere by its `name`."""
