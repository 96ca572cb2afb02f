"""Targets other than a class: values for `target=`.

A target is a `Question` to a model; its answer is the score to explain (see `vitx.targets.question`).
"""

from vitx.targets.query import best_queries as best_queries
from vitx.targets.query import query as query
from vitx.targets.question import Answers as Answers
from vitx.targets.question import Asked as Asked
from vitx.targets.question import Question as Question
from vitx.targets.region import region as region
from vitx.targets.region import token as token
from vitx.targets.similar import Text as Text
from vitx.targets.similar import similar_to as similar_to
from vitx.targets.similar import text as text
from vitx.targets.word import Prompted as Prompted
from vitx.targets.word import answer as answer
from vitx.targets.word import word as word
