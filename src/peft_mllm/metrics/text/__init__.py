"""What several metrics do to text: normalisers, tokenisers, n-grams, singular forms. No item of the shelf."""
