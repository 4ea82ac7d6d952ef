"""`kvarena soak`: many streams over many kinds of prompts while parts of the stack die, hang and fill up.

`streams` has the prompts, who asks what, and which answers are right; `faults` what is done to the services meanwhile;
`campaign` the course of a run, and what has to hold after it.

An answer is right when it is what `plain` gives to the same prompt alone, token for token, at temperature 0. But
kernels round differently in another batch, and compiled ones differently from a blend's, which runs its layers
uncompiled. So two tokens that are about equally likely on both sides may change places: such a tie is counted, and the
rest of that answer isn't compared.
"""
