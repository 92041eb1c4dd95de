"""The quantized layers of bitsandbytes; where it is not installed, no layer is one of them."""

try:
    import bitsandbytes
    from bitsandbytes.functional import QuantState, dequantize_blockwise
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
except ImportError:
    bitsandbytes = dequantize_blockwise = None
    Linear4bit = Linear8bitLt = QuantState = type("Absent", (), {})
