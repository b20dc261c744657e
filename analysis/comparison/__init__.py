"""Two arms on the same examples: is A better than B, worse, equal within a margin, or is it undecided?"""
