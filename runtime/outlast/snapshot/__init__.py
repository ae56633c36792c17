"""The memory tier: images on tmpfs, copied behind training, protected by parity between nodes, and rebuilt from it.

``identity``   attempts and generations
``layout`` ``image``  one image file: a safetensors file with a checksum per block and a seal
``kernel`` ``copier`` ``cuda``  filling an image while training goes on
``erasure`` ``codec``  where data and parity of a group lie, and the arithmetic
``placement``  which nodes form a group
``restore``    what can be rebuilt from what is left, and from where (pure)
``keeper`` …   the process on each node that holds, encodes, verifies, serves and rebuilds
"""
