"""FP8: E4M3 codes under one float32 scale per weight.

Facts import no torch; codes do. ModelOpt and its E4M3 casts are the oracle.
"""
