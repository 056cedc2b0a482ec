"""Drawing helpers of the figures.

base       the table that a figure gets, the drawing that it returns, the style and the caption
files      from a table's file to the files of a figure
report     the page of a run: the answer, the figures, all cells, checks, provenance
quality    checks of the results table
canvas     sheets of panels below a title and a key; what panels have in common
key        the key of a sheet
styles     the colour and marker of each method
labels     words and numbers as a figure shows them
curves     lines over one quantity, for studies
errors     error against cost, for the two figures of it
tasks      the fastest time for each task and tolerance
speedups   speed-ups at equal accuracy
pntk       quantities and panels of the figures of the pNTK
claims     what papers claim, what was measured here, and the verdict
verdicts   the figure of all claims of a set of figures
sources    values that the papers published, and claims that nothing here speaks to
"""
