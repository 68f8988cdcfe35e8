"""What differs from one system to the next: what a machine has, how files become durable, what MLX's GPU is.

system.py knows processors, memory and folders; files.py knows descriptors and names; gpu.py knows MLX's devices and
limits; allocator.py knows malloc; interrupt.py knows Ctrl-C and the signals that end a program. Nothing else in the
package asks which system it runs on: the form of macOS is tested on Linux by replacing what these ask. They know
nothing of models.
"""
