"""Numbers in few bits: code books, and blocks of codes with a scale each."""
