"""Examples to train on and to score by: read, fetched or made.

``lines`` reads JSONL, ``examples`` says what a row means, ``sources`` finds the files of a folder
or a hub dataset, ``layout`` turns an example into token ids. ``textualized_tree``,
``amazon_reviews`` and ``commitpackft`` are the paper's three tasks; ``trees``, ``sampling`` and
``writing`` are what they are made with.
"""
