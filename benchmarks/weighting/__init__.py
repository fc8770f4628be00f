"""The study of docs/study-weighting.md: is a LoKr with uneven factors better than an equal one of the same size?"""
