"""Drawing helpers of the figures.

base       the table of a figure, the drawing that it returns, the style and the caption
files      from a table's file to the files of a figure
gallery    the page that shows all figures
canvas     sheets of panels below a title and a key; helpers for panels
key        the key of a sheet
styles     the colour and marker of each method
labels     formatting of words and numbers
curves     lines over one quantity, for studies
errors     error against cost, for the two figures that show it
tasks      the fastest time for each task and tolerance
speedups   speed-ups at equal accuracy
pntk       quantities and panels of the figures of the pNTK
claims     what papers claim, what was measured here, and the verdict
verdicts   the figure of all claims of a set of figures
sources    values that the papers published, and claims that nothing here tests
"""
