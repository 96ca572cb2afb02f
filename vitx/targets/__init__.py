"""Targets that ask for something else than a class: values for `target=`.

A target is a `Question`: it is put to a model and its images, and the answer is what to explain, see
`vitx.targets.question`.
"""

from vitx.targets.query import Query, best_queries, query
from vitx.targets.question import Asked, Question
from vitx.targets.region import Region, Token, region, token
from vitx.targets.similar import Similar, Text, similar_to, text
from vitx.targets.word import Answer, Prompted, Word, answer, word

__all__ = [
    "Answer",
    "Asked",
    "Prompted",
    "Query",
    "Question",
    "Region",
    "Similar",
    "Text",
    "Token",
    "Word",
    "answer",
    "best_queries",
    "query",
    "region",
    "similar_to",
    "text",
    "token",
    "word",
]
