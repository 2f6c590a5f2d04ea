"""Retrieval: collections with judgments, their files, first-stage retrieval, candidate lists and words.

collection = load_collection("cranfield")             # or read_beir, read_msmarco, make_collection
index = Index(collection.texts())                     # BM25
candidates = index.search(collection.query_texts(), k=50)
feedback = rm3(index, collection.query_texts(), k=50)
write_candidates(path, candidates)
vocabulary = build_vocabulary(collection.texts())
documents = encode(collection.texts(), vocabulary, length=200)
embeddings = ppmi_embeddings(documents, vocabulary)   # row 0 is the pad's
"""

from __future__ import annotations

from shared.data.retrieval.candidates import (
    PAD,
    Candidates,
    mix,
    read_candidates,
    top_candidates,
    write_candidates,
)
from shared.data.retrieval.collection import COLLECTIONS, Collection, load_collection, make_collection
from shared.data.retrieval.formats import (
    read_beir,
    read_msmarco,
    read_run,
    read_trec_qrels,
    read_triples,
    write_run,
)
from shared.data.retrieval.index import (
    Index,
    LatentSemanticIndex,
    coordination_match,
    coordination_of,
    rm3,
    rm3_queries,
)
from shared.data.retrieval.words import Vocabulary, build_vocabulary, encode, ppmi_embeddings

__all__ = [
    "COLLECTIONS",
    "PAD",
    "Candidates",
    "Collection",
    "Index",
    "LatentSemanticIndex",
    "Vocabulary",
    "build_vocabulary",
    "coordination_match",
    "coordination_of",
    "encode",
    "load_collection",
    "make_collection",
    "mix",
    "ppmi_embeddings",
    "read_beir",
    "read_candidates",
    "read_msmarco",
    "read_run",
    "read_trec_qrels",
    "read_triples",
    "rm3",
    "rm3_queries",
    "top_candidates",
    "write_candidates",
    "write_run",
]
