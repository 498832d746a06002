"""The quantizer: a Llama-family checkpoint in, a packed 4- or 8-bit checkpoint out."""
