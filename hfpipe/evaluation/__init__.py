"""Evaluation: from the suites of a recipe to scores of a model.

1. `suites.py` reads the rows and gives every rank its share; `bias_rows.py` makes some of them.
2. `answers.py` asks the model what a metric needs: a likelihood, a choice, a class, a number, or generated text.
3. `row_text.py` and `continuations.py` make token ids of a row, by the rules of lm-eval; `likelihood.py`,
   `generation.py` and `seq2seq.py` run the model on them.
4. `metrics/` turns the answers of all ranks to scores with errors, a class a metric, and compares two models.
5. `lm_eval.py` has tasks of lm-eval scored by lm-eval itself; `shift.py` compares texts, and asks for no metric.
"""
