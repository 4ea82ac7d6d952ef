"""`kvarena soak`: many streams over many kinds of prompts while parts of the stack die, hang and fill up.

| file | what it knows |
|---|---|
| `prompts.py` | the prompts: warm, made up, repetitive, odd, too long |
| `streams.py` | who asks what, and which answers are right |
| `faults.py` | what is done to the services meanwhile |
| `checks.py` | what has to be as it was before, and what has to add up |
| `campaign.py` | the course: references, rehearsal, faults, settling |
| `command.py` | the command line |

An answer is right when it is what `plain` gives to the same prompt alone, token for token, at temperature 0. Kernels
round otherwise in another batch, and compiled ones otherwise than those of a blend, which runs its layers as they are.
So two tokens that both sides think as good as equally likely may change places: such a tie is counted, and the rest of
that answer isn't compared.
"""
