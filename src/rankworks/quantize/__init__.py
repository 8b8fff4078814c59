"""Quantisation of the base: code books, weights moved to their quantised values, and what an adapter starts from."""

from rankworks.core.codes.blocks import Blocks, dequantise_blocks, quantise_blocks
from rankworks.core.codes.books import NF4, code_book
from rankworks.quantize.api import quantise

__all__ = ["NF4", "Blocks", "code_book", "dequantise_blocks", "quantise", "quantise_blocks"]
