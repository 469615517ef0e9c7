"""Tensor parallel: matrices divided over ranks that see the same data.

==========  ==============================================================
`styles`    the names of plans, and what each does to a module
`plan`      which module is divided how, decided before anything is changed
`audit`     what is refused, since its result would be another one
`apply`     dividing a model by a plan; comparing what must be alike
`layers`    what modules exchange in forward and backward
`loss`      cross entropy of logits that are divided by vocabulary
==========  ==============================================================
"""
