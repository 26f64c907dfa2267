from tasks.core.shell import main
from tasks.mask_search import stage

main(stage)
