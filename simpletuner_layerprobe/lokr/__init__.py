"""Contributions -> LoKr factors -> LyCORIS config -> proof that LyCORIS applies it."""
