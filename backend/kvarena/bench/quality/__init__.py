"""`kvarena eval` and `kvarena calibrate`: how good the answers of contenders are, on questions with gold answers, and
how fast they come.

`questions` are put to variants by `asking`, over HTTP (`http_answerer`) or in this process (`session`); `scoring`
makes figures of the answers and a result file's rows; `calibration` chooses a model's settings by them.
"""
