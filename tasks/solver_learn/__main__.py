from tasks.core.shell import main
from tasks.solver_learn import stage

main(stage)
