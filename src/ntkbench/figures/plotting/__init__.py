"""Drawing helpers of the figures.

base       the table of a figure, the drawing that it returns, the style and the caption
files      from a table's file to the files of a figure
report     the page of a run: the answer, claims, figures, all cells, checks, provenance
comparison the page of a comparison of methods on one network
quality    checks of the results table
canvas     sheets of panels below a title and a key; what panels have in common
key        the key of a sheet
styles     the colour and marker of each method
labels     formatting of words and numbers
curves     lines over one quantity, for studies
tasks      the fastest time for each task and tolerance
pntk       quantities and panels of the figures of the pNTK
claims     what papers claim, what was measured here, and the verdict
verdicts   the figure of all claims of a set of figures
sources    values that the papers published, and claims that nothing here tests
"""
