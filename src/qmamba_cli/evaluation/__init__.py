"""Evaluation: last-word prediction as lm-eval scores it, and perplexity over running text.

`tasks` names the built-in tasks, `documents` reads their texts, `scoring` turns a model and texts into
scores, `statistics` turns scores into metrics with standard errors, `results` puts them in lm-eval's layout.
"""
