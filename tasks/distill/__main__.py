from tasks.core.shell import main
from tasks.distill import stage

main(stage)
