"""Other papers' systems: Time-R1, TAR-TVG and TVG-R1. Nobody who only wants Invert4TVG needs to read this."""
