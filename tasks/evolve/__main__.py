from tasks.core.shell import main
from tasks.evolve import stage

main(stage)
