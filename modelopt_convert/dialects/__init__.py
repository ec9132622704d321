"""What producers write: names, packing, markers and config, one object a dialect.

The finder of packed modules is here too, since names and roles are a dialect's. Everything is pure; no tensor's bytes
are looked at.
"""
