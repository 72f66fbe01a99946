"""The paper's count of hallucinated captions: a page that a person fills in, and what two persons agree on.

The study (arXiv 2406.05130, appendix I) captions 100 images and counts the captions that say what is not there. Here a
person sees image, caption and references, and says yes or no; nothing on the page tells which model wrote a caption.
"""
