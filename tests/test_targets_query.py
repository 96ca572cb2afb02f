"""One object of a detector as the target."""

import re

import pytest
import torch

from tests.by_hand import METHODS, check
from tests.dense_models import DETECTORS, made
from vitx import VitxError, explain
from vitx.pictures.views import painted
from vitx.targets import best_queries, query

WITH_NONE = "detr", "yolos"


@pytest.mark.parametrize("name", DETECTORS)
def test_it_is_the_logit_by_hand(name):
    model, images = made(name)
    index = torch.tensor([1, 4])

    def score(output):
        return output.logits[torch.arange(2), index, 2]

    found = check(model, images, query(index, 2), score, ("rollout", "evidence"))["evidence"]
    assert found.captions[0].startswith("query 1: class 2 ")
    output = model(images)
    x, y, width, height = (output.pred_boxes[0, 1] * images.shape[-1]).tolist()
    wanted = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    assert found.boxes[0].tolist() == pytest.approx(wanted, abs=1e-3)
    shares = output.logits.softmax(-1)[..., :-1] if name in WITH_NONE else output.logits.sigmoid()
    best = shares.amax(-1).topk(3).indices
    assert best_queries(found, 3).equal(best)
    assert best_queries(found[1:].cpu(), 3).equal(best[1:])


def test_its_best_class_is_never_none():
    model, images = made("yolos")
    with torch.no_grad():
        model.class_labels_classifier.layers[-1].bias[:] = torch.tensor([0.0, 0.0, 9.0, 0.0, 99.0])
    check(model, images, query(3), lambda output: output.logits[:, 3, 2], METHODS)


def test_two_queries_of_one_picture_look_at_other_places():
    model, images = made("yolos")
    torch.nn.init.normal_(model.vit.embeddings.detection_tokens)
    found = explain(model, images[:1].expand(2, -1, -1, -1), "evidence", target=query([1, 4]))
    assert not torch.allclose(found.maps[0], found.maps[1], rtol=1e-2)
    assert found.picture().ndim == 3


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (lambda: query(6), "queries 0 to 5"),
        (lambda: query([1, 2, 3]), "3 queries for 2 images"),
        (lambda: query(1.5), "a query is an integer"),
        (lambda: query("a"), "a query is an integer, or one for each image, found 'a'"),
        (lambda: query([None]), "a query is an integer, or one for each image, found [None]"),
        (lambda: query(1, 4), "classes 0 to 3"),
        (lambda: 3, "the output is (2, 6, 5): use vitx.targets.query"),
    ],
)
def test_bad_words(target, said):
    model, images = made("yolos")
    with pytest.raises(VitxError, match=re.escape(said)):
        explain(model, images, target=target())


def test_the_best_queries_are_those_of_a_detector():
    model, images = made("yolos")
    with pytest.raises(VitxError, match="cannot choose 7 of 6 queries"):
        best_queries(explain(model, images), 7)
    with pytest.raises(VitxError, match="no queries: give the explanation of a detector"):
        best_queries(torch.rand(1, 6, 5), 1)


def test_a_box_is_drawn_where_it_lies():
    paper = torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
    drawn = painted(paper, (32, 32), torch.tensor([[8.0, 4.0, 16.0, 40.0]]))[0].amax(-1)
    rows, columns = drawn.nonzero().T
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (56, 112, 28, 223)
    assert not drawn[60:200, 70:100].any()
