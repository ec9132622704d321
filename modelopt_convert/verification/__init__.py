"""``mopt verify``: container, layout, decode, kernel parity: each level passes, fails or says why it did not run."""
